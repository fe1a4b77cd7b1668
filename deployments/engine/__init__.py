"""One engine replica as Ray Serve runs it: the replica, its tokens' way out, its status board."""
