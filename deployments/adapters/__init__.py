"""Which adapters clients may name, and where that is said: in the configuration, at run time, or by a directory."""
