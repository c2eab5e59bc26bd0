"""AdamW and Muon on flat slices, float32 main parameters, loss scaling, clipping and schedules."""
