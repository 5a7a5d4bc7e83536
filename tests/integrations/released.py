def sglang(folder):
    raise NotImplementedError
