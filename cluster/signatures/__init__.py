"""A request router by expert signature: what a prompt's text says about its experts, learnt from what routers saw, and
which router computes such prompts. Serve's end is in `request_router.py` and a router's in `report.py`; the rest is
pure, and knows neither Ray nor a clock."""
