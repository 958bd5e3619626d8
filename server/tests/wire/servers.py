"""The servers that many tests share, by the names of their fixtures."""

from server_process import API_KEY

# Where tests look at a stage while it lasts, the server leaves a core to those who look.
SERVERS = {
    # Defaults: 64 rows, long steps.
    "wide": dict(options=()),
    # One row and one token per step, so that every stage lasts as many steps as it has tokens; four places to wait.
    "narrow": dict(
        options=(
            *("--max-num-seqs", "1", "--max-num-batched-tokens", "1", "--max-num-queued-reqs", "4"),
            *("--threads", "1"),
        )
    ),
    # One row, and most of a long prompt in one step, so that a first chunk lasts long enough to be met.
    "chunky": dict(options=("--max-num-seqs", "1", "--max-num-batched-tokens", "768", "--threads", "1")),
    # Nine rows over 96 blocks, and steps that take any sequence whole: whoever lost its blocks waits until all fit again.
    "tight": dict(
        options=(
            *("--max-num-seqs", "9", "--max-num-batched-tokens", "1024"),
            *("--block-size", "16", "--kv-cache-memory", "3MiB", "--threads", "1"),
        )
    ),
    # Eight rows and short steps over KV blocks for about two long sequences: preemption is the rule, in prefill too.
    "cramped": dict(
        options=(
            *("--max-num-seqs", "8", "--max-num-batched-tokens", "16"),
            *("--block-size", "4", "--kv-cache-memory", str(512 << 10)),
        )
    ),
    # Closed to strangers.
    "keyed": dict(options=("--api-key", API_KEY), api_key=API_KEY),
}
