# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What a run learned, to look at and to listen to. `run_folder` reads what its stages left, `clips`
shows training clips to its models, `clusters` sums up, `page` writes it and `server` serves it.
"""
