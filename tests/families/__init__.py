"""Every family of causal language models of the installed transformers, tiny and random, against its plain call.

    make families                                            all, a line each, and the table of docs/models.md
    PYTHONPATH=tests .venv/bin/python -m families llama t5   some
    PYTHONPATH=tests .venv/bin/python -m families --media    classes of images, sounds and texts, fed with texts

`configs` makes configurations, `models` builds models of them, `checks` compares, and `page` writes the table.
"""
