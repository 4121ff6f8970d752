"""How the window is laid out, wide, narrow and tiny."""

from __future__ import annotations

#: columns from which the panel stands beside the conversation, and rows below which only conversation and input are left
WIDE, SHORT, TINY = 110, 16, 9

CSS = """
#keys { height: 1; padding: 0 1; background: $panel; }
#head { height: 1; background: $panel; color: $foreground; padding: 0 1; }
#talk { height: 1fr; width: 1fr; padding: 0 0 0 1; }
#body { height: 1fr; }
#side { height: 1fr; width: 1fr; }
#summary { height: 2; padding: 0 1; background: $panel; }
Panel { border-left: solid $panel; }
Prompt { border: round $accent; }
Prompt:focus { border: round $accent; }
.-narrow Panel { display: none; }
.-wide #summary { display: none; }
.-show-panel Panel { display: block; }
.-show-panel.-narrow #summary { display: none; }
.-hide-panel Panel { display: none; }
.-hide-panel #summary { display: block; }
.-short #head, .-short #keys, .-tiny #head, .-tiny #keys { display: none; }
.-tiny #summary, .-tiny Panel { display: none; }
.-tiny Prompt { border: none; min-height: 1; max-height: 2; }
Toast { max-width: 70%; }
ToastRack { margin-bottom: 4; }
"""
