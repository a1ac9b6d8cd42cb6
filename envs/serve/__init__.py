"""Environments for trainers on other machines: a server over HTTP, and what its client shares with it.

- ``wire``: messages as msgpack or JSON, and the hash that tells whether an episode played again as before.
- ``settings``: what a server is told. ``arguments``: which environments and arguments clients may choose.
- ``spaces``: observation and action spaces as plain values.
- ``hosted``: the environment that a pool's worker runs. ``pools``: the thread that owns a pool.
- ``sessions``: sessions, their limits and their end. ``guard``: token, host and size of a request.
- ``app``: the FastAPI application. ``running``: a server in this process. ``command``: the command line.
- ``connection``: the client's side of one server; ``agentropy.envs.remote`` has the environment.

Nothing is imported here, so that the client needs none of the server's packages.
"""
