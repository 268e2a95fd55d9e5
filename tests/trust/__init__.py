import os

os.environ.setdefault("TQDM_DISABLE", "1")  # before the libraries with bars are imported
