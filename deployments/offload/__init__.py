"""Work that takes long, off the event loop: in threads and processes, tenants in turns."""
