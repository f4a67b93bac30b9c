"""The gateway: the OpenAI API in front of an engine. make_app(settings) is the FastAPI application, `vera serve` runs it."""
