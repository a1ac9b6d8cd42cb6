"""Tool use: Python in a sandbox, a calculator, search, functions and MCP servers, and tasks to use them for.

- ``env``: ``ToolsEnv``. ``tasks``, ``generated``, ``files``, ``reasoning``: where tasks come from; ``answers``: when an
  answer is right.
- ``formats``: how calls are written. ``protocol``, ``builtin``, ``calculator``, ``mcp_client``: the tools.
- ``interpreters``, ``monty``, ``cpython``: Python for agents; ``sandbox_lockdown``, ``sandbox_driver``, ``janitor``:
  what confines it.
"""
