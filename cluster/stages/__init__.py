"""The processes that compute: one stage each, its loop, its links to the neighbours."""
