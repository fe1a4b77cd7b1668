"""`caravan preflight`: whether the nodes of a Ray cluster are what a configuration needs, before it is deployed."""
