"""Whether a request was made by a web page of somebody else's, in the browser of somebody who reaches the service.

Where keys are asked for such a page has none. Where they are not, any page could use what its reader reaches: with a
plain form, or by a name of its own that it lets point to the service's address (DNS rebinding). Browsers say in
`Origin` whose page it was that made a request which is more than a look.
"""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers


def is_foreign(headers: Headers, allowed: Collection[str]) -> bool:
    """By the request's `Origin` and `Host`: one without an origin was not made by a page; `allowed` may hold "*"."""
    origin = headers.get("origin")
    if origin is None or origin in allowed or "*" in allowed:
        return False
    try:
        page = urlsplit(origin)
        return page.netloc != headers.get("host", "") or not _is_address(page.hostname or "")
    except ValueError:  # no URL at all
        return True


def _is_address(host: str) -> bool:
    """Whether nobody can let it point elsewhere: an IP address, or this machine's own name for itself."""
    try:
        return host == "localhost" or bool(ipaddress.ip_address(host))
    except ValueError:
        return False
