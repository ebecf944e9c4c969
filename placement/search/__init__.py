"""Finding placements: the request, the searches of a layer, the optimizer over all layers. Moving weights is
`placement.migration`; when to plan is the controller's decision.
"""
