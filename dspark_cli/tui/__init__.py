"""The terminal UI of `dspark chat`: one window with the conversation and what speculation is doing.

`opening`, `commands`, `decoder`, `budget`, `history`, `draw`, `words` and `display` know no Textual and are tested without it.
"""
