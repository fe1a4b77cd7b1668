"""The live page: what the pipelines do at this moment, and a chat box to give them something to do."""
