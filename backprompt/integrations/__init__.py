"""backprompt in other libraries' programs; each module needs the library that it is named after."""
