"""Send odd requests to a service and say what went wrong: a 5xx, a dropped connection, a neighbour's changed tokens.

    python -m benchmarks.serving.fuzz_http --requests 10000                  # starts an engine of its own
    python -m benchmarks.serving.fuzz_http --url http://127.0.0.1:8000       # a running service

One request in five comes from schemathesis and the service's own OpenAPI document, the others from Hypothesis. The
exit status is 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from benchmarks.common import save
from benchmarks.serving.fuzz_http.campaign import Campaign
from benchmarks.serving.fuzz_http.own_server import own_server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="200 requests: does it work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="of a running service; without it an engine with the tiny model is started")
    parser.add_argument("--key", help="API key of that service")
    args = parser.parse_args()
    count = 200 if args.quick else args.requests

    def run(url: str) -> Campaign:
        campaign = Campaign(url, args.key, show_progress=True)
        start_s = time.monotonic()
        campaign.run(count, args.seed)
        print(f"{time.monotonic() - start_s:.0f} s for {count} requests and seed {args.seed}")
        return campaign

    if args.url is not None:
        campaign = run(args.url)
    else:
        with own_server() as url:
            campaign = run(url)
    report = campaign.report()
    print(json.dumps(report, indent=1))
    save("fuzz_http", report)
    return 1 if campaign.went_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
