"""A page and pictures for people who judge a placement. They show the planner's figures and compute no others."""
