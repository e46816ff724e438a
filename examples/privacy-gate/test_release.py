def test_release_is_private(ortho_audit):
    ortho_audit("artefact", records="records.jsonl").assert_private(min_ratio=8)
