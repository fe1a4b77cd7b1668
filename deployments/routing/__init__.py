"""Which pipeline a request goes to, and how many pipelines there are."""
