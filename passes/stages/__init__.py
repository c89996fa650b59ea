"""From a step to pipeline stages: `source` traces and cuts it, `plan_stage` plans one stage."""
