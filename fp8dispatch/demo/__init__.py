"""The main job on real input: a sentence encoder whose linear layers are replaced by FP8 ones.

``python -m fp8dispatch.demo`` compares the embeddings of every recipe with those of the fp32 model
and takes two LoRA steps on frozen FP8 weights. It needs the extra ``demo``.

What belongs here: loading a model and its sentences (`encoder`), the comparison (`compare`), the
fine-tuning steps (`lora`) and what is printed and written about them (`report`, `render`). Nothing
in the library imports this package.
"""
