#!/usr/bin/env python3
"""llama.cpp's converter for a tokenizer it does not know: it recognises pre-tokenizers by a hash of their output, and ours is GPT-2's.

python convert_gguf.py LLAMA_CPP_SOURCE MODEL [arguments of convert_hf_to_gguf.py]
"""

import sys

source = sys.argv.pop(1)
sys.path.insert(0, source)
import conversion.base
import convert_hf_to_gguf

conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
