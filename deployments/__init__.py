"""How the model is offered: Ray Serve deployments, the OpenAI-compatible API, the command line."""
