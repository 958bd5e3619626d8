"""A client of its own process: opens long streams, says so once each has a token, and reads on. Made to be killed."""

import sys

from client import Client
from stages import LONG_DECODE


def main():
    """crowd.py ADDRESS COUNT"""
    address, count = sys.argv[1], int(sys.argv[2])
    client = Client(address)
    streams = [client.start(**{**LONG_DECODE, "max_tokens": 1000}) for _ in range(count)]
    for stream in streams:
        stream.read_tokens(1)
    print(f"{count} streams", flush=True)
    while True:
        for stream in streams:
            stream.read()


if __name__ == "__main__":
    main()
