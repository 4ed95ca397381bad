"""Serving: an `LM` behind HTTP, with requests and answers as OpenAI's.

The folder may import everything but the command line. A new endpoint is a body in `bodies.py`, a function in
`answers.py`, and a route in `app.py`.
"""
