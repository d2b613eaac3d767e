#!/usr/bin/env python3
"""A Hugging Face Hub on this machine, for rehearsing pushes without an account and for tests.

It speaks the Hub's own protocol to the unmodified `huggingface_hub` client, keeps everything in one folder, and listens
on 127.0.0.1 only.

    python scripts/local_hub --store my_hub

then, in another terminal, the lines that it prints, and push and load as usual.
"""

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path

_TOKEN = "you=hf_local"
_FAULTS = """\
faults, for trying out what goes wrong (scripts/local_hub/faults.py says more):

  --fault 'status=503 path=/resolve/ nth=2'        the second download request fails once
  --fault 'status=429 retry_after=1 times=3'       the first three requests of any kind
  --fault 'cut=down after=1000 path=/_storage/'    every download of a large file breaks after 1000 bytes
  --fault 'cut=up method=PUT times=1'              one upload breaks
  --fault 'corrupt=-1 path=/_storage/'             the last byte of every large file is wrong
  --fault 'rate=100000'                            100 KB per second

while it runs: GET, PUT and DELETE /_local/faults (a JSON list), GET /_local/log (also in log.jsonl in the folder)
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="local_hub",
        description=(__doc__ or "").partition("\n\n    python")[0],
        epilog=_FAULTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--store", type=Path, default=Path("local_hub"), help="folder to keep (default ./local_hub)")
    parser.add_argument("--port", type=int, default=8765, help="port on 127.0.0.1; 0 takes a free one (default 8765)")
    parser.add_argument(
        "--token",
        action="append",
        metavar="NAME=TOKEN",
        help=f"a user and a token that may write; may be repeated (default {_TOKEN})",
    )
    parser.add_argument(
        "--read-token", action="append", default=[], metavar="NAME=TOKEN", help="a token that may only read"
    )
    parser.add_argument(
        "--org", action="append", default=[], metavar="ORG=NAME[,NAME]", help="an organisation and its members"
    )
    parser.add_argument("--fault", action="append", default=[], metavar="WORDS", help="see below; may be repeated")
    parser.add_argument("--until-input-ends", action="store_true", help="stop when standard input is closed")
    arguments = parser.parse_args()
    arguments.token = arguments.token or [_TOKEN]
    return arguments


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(f"{option}: expected NAME=VALUE, found {text!r}")
    return name, value


def _print_exports(url: str, token: str) -> None:
    lines = [f"export HF_ENDPOINT={url}", f"export HF_TOKEN={shlex.quote(token)}"]
    # Clients with hf_xet would look for the Hub's newer storage, which is not here.
    lines.append("export HF_HUB_DISABLE_XET=1")
    if any(name.lower() in ("http_proxy", "all_proxy") for name in os.environ):
        lines.append("export NO_PROXY=127.0.0.1,localhost")
    print("\n".join(lines), flush=True)


def main() -> int:
    arguments = _arguments()
    # Not before now: --help needs none of it. Python puts this folder on the path; its parent finds the package.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]
    try:
        from local_hub import faults
        from local_hub.accounts import Accounts, User
        from local_hub.errors import HubError
        from local_hub.names import check_repo_part
        from local_hub.server import serve
    except ModuleNotFoundError as error:
        print(f"{error}. Install what the hub needs: pip install 'hf_timm_tower[hub]'", file=sys.stderr)
        return 2

    logging.basicConfig(level=logging.ERROR)
    try:
        orgs = [_pair(text, "--org") for text in arguments.org]
        tokens = {}
        for option, role in (("--token", "write"), ("--read-token", "read")):
            for text in arguments.token if role == "write" else arguments.read_token:
                name, token = _pair(text, option)
                belongs = tuple(org for org, members in orgs if name in members.split(","))
                tokens[token] = User(check_repo_part(name), role, belongs)
        first = _pair(arguments.token[0], "--token")[1]
        serve(
            arguments.store,
            Accounts(tokens),
            arguments.port,
            [faults.from_words(text) for text in arguments.fault],
            lambda url: _print_exports(url, first),
            arguments.until_input_ends,
        )
    except (ValueError, OSError, HubError) as error:
        print(f"local_hub: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # uvicorn passes it on once it has shut down
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
