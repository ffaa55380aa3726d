"""Another name of r50_nuimg_704x256_8f.py."""

_base_ = './r50_nuimg_704x256_8f.py'
