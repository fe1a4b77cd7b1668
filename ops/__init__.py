"""How the service is watched, loaded and proven. Imports none of the other folders."""
