"""What several models behind one address cost and save: the gateway's hop, and experts that two engines share.

Figures of one model's service stand a folder above.
"""
