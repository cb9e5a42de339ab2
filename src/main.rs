//! The `sdgen` command.
use candle_core as _;
fn main() {}
