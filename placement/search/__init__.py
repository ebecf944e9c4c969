"""Finding placements: the request, the searches of a layer, the optimizer over all layers. It moves no weights and
decides no time: `placement.migration` and the controller do."""
