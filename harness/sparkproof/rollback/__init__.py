"""The way back: record what a machine has (`snapshot`), say what came since (`diff`), and take that off again
(`plan`, `undo`).

Nothing is removed that a snapshot does not prove to be new. `tree` looks at folders and removes single files without
ever following a link; `environment`, `caches` and `host` read; `journal` makes an interrupted removal resumable;
`manifest` lists what sparkproof itself made.
"""
