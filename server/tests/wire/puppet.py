"""A client process that sends one request when it is told to and reports what comes. Made to be killed."""

import sys

from client import pb
from raw_client import RawClient


def main():
    """puppet.py ADDRESS; a GenerateRequest in hexadecimal comes on stdin, the number of tokens so far goes to stdout."""
    raw = RawClient(sys.argv[1])
    print("ready", flush=True)
    number = raw.generate(pb.GenerateRequest.FromString(bytes.fromhex(sys.stdin.readline())))
    for count in range(1, sys.maxsize):
        raw.wait_for_tokens(number, count, seconds=600)
        print(count, flush=True)


if __name__ == "__main__":
    main()
