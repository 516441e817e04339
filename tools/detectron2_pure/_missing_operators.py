# Added by avdet2 (tools/install_detectron2.py); not a part of Detectron2.
"""
Stands in for the compiled operators: using one raises an ImportError that says what to do.
"""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(
        f"the operator {name!r} is compiled code, which this installation of Detectron2 "
        "(0.6+pure) does not have: build Detectron2 from source to use it"
    )
