"""Looking at runs: a page in the browser, the same page as files, and trees in the terminal.

- ``library``, ``saved_run``: runs that were found, and what the page is told of each. ``app``: the page's server.
- ``export``: the page with all it is told, as files. ``command``: ``agentropy view``. ``text``: trees in the terminal.
- ``index``: what a step's trajectories are, beside them. ``tree_answer``, ``pieces``: one tree, and its tokens as text.
"""
