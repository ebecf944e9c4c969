"""Pictures and a page for people who judge a placement. No figure is computed here that the planner does not know."""
