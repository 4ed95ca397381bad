"""Serving: an `LM` behind HTTP, with requests and answers in the form of OpenAI's API.

The folder may import all other folders but the command line. A new endpoint is a body in `bodies.py`, a function in
`answers.py`, and a route in `app.py`.
"""
