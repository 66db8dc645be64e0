"""The project's image, in a container of Docker or Podman: find the engine, start there what runs on the host too, and
say in one sentence what stands in the way.

All goes through the engine's HTTP API but two things: the build (BuildKit has no HTTP API, so the engine's own command
builds), and the terminal of `make shell` (the engine's own command attaches it).
"""
