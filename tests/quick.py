"""How many examples a test draws that does not draw as many as its profile says."""

import os

IS_QUICK = os.environ.get("HYPOTHESIS_PROFILE") == "quick"


def up_to(num_examples: int) -> int:
    """So many, and few for the profile of slow devices."""
    return min(num_examples, 4) if IS_QUICK else num_examples
