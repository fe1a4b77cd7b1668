"""JSON schema's string formats as regular expressions.

An answer must have its format, not any form of it: each expression matches a part of what the format's RFC allows, and
nothing else. Years have four digits, names of hosts are short and in ASCII.
"""

_DATE = (
    r"([1-9][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|"
    r"02-(0[1-9]|1[0-9]|2[0-8]))|"
    r"([1-9][0-9](0[48]|[2468][048]|[13579][26])|([2468][048]|[13579][26])00)-02-29)"  # years that have this day
)
_CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](\.[0-9]{{1,6}})?(Z|[+-]{_CLOCK})"
_OCTET = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_GROUP = r"[0-9a-f]{1,4}"
_LABEL = r"[a-z0-9]([a-z0-9-]{0,14}[a-z0-9])?"
_HOST = rf"({_LABEL}\.){{1,3}}[a-z]{{2,6}}"
_URI = rf"https?://{_HOST}(:[1-9][0-9]{{1,3}})?(/[A-Za-z0-9_.~-]{{1,20}}){{0,3}}/?(\?[A-Za-z0-9_=&-]{{1,20}})?"

STRING_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": (
        r"P([0-9]{1,3}W|[0-9]{1,4}D(T[0-9]{1,2}H([0-9]{1,2}M([0-9]{1,2}S)?)?)?|"
        r"T([0-9]{1,4}H([0-9]{1,2}M([0-9]{1,2}S)?)?|[0-9]{1,4}M([0-9]{1,2}S)?|[0-9]{1,6}S))"
    ),
    "email": rf"[A-Za-z0-9_+-]{{1,20}}(\.[A-Za-z0-9_+-]{{1,20}})?@{_HOST}",
    "hostname": _HOST,
    "ipv4": rf"({_OCTET}\.){{3}}{_OCTET}",
    "ipv6": rf"(({_GROUP}:){{7}}{_GROUP}|({_GROUP}:){{1,6}}:{_GROUP}|::{_GROUP})",
    "uri": _URI,
    "uri-reference": _URI,
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "json-pointer": r"(/[A-Za-z0-9_-]{1,20}){1,4}",
}
