"""Graph passes, one a file: each takes a captured graph and gives one that computes the same. Changes to *modules*, before
anything is captured, are in `rewrite/`. These are all lists of them, in the order in which a graph meets them:

    functionalize            torch.export's graph, in place of its own second trace (`capture/capture.py`)
    CAPTURE_PASSES           every graph, as capture ends                            (`capture/capture.py`)
    cast_attention           the denoiser's, by `attention.dtype`: right after capture, for costs count what runs
    set_attention_backend    the denoiser's, by `attention.backend`: once costs are counted, which know torch's operator only
    list_passes(config)      the backend's own                                       (`lower/*`: AOTInductor's, ONNX's, TensorRT's)
"""
