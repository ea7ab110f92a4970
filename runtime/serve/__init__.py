"""The server: artifacts behind OpenAI's Images API. `app.py` has its routes. Needs the extra `serve`; nothing else imports this folder."""
