#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Writes RUN/report/index.html: a page to look at and to listen to, of what a pipeline has learned.

    python tools/report.py --run output/my_videos
    python tools/report.py --run output/my_videos --serve

The page shows each cluster's clips with their sound. Names that are typed there are saved as
clusters.json: with --serve in the run's folder, where all tools find it; else as a download, to be
put there. The folder RUN/report opens from disk, and can be copied as it is.
"""

import argparse

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(folders=["--run"])

from detectron2.utils.logger import setup_logger

from avdet2.report.page import CLIPS, write_report
from avdet2.report.server import serve
from avdet2.utils.tool import run_tool


def main() -> None:
    """
    Write the page, and serve it if asked to.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="OUTPUT_DIR of a pipeline")
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips to show of each cluster")
    parser.add_argument("--serve", action="store_true", help="on 127.0.0.1, until Ctrl-C")
    parser.add_argument("--port", type=int, default=8000, help="of --serve; 0: a free one")
    args = parser.parse_args()
    setup_logger(name="avdet2", abbrev_name="av")
    report = write_report(args.run, args.clips)
    print(f"the page is {report.index}")
    if args.serve:
        serve(args.run, args.port, lambda url: print(f"and {url} (Ctrl-C ends it)", flush=True))


if __name__ == "__main__":
    run_tool(main)
