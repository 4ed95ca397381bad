"""What connects backprompt with other libraries; each module imports its library, and only it does."""
