//! What transformers of text and picture share (Esser et al. 2024, arXiv 2403.03206): layers that a
//! timestep scales and shifts, and the block of Stable Diffusion 3 and FLUX.1 in which text and
//! picture have weights of their own and attend to both.

use crate::nn::Forward;
use crate::nn::attention::{QkNorm, attention};
use crate::nn::layers::{Activation, LayerNorm, Linear, gelu_tanh};
use crate::nn::rotary::Rotary;
use crate::nn::weights::Weights;
use anyhow::Result;
use candle_core::{DType, Result as TensorResult, Tensor};

/// Of all norms.
const EPS: f64 = 1e-6;
/// The largest number of f16.
const F16_MAX: f64 = 65504.0;
/// How much wider the hidden layer of a feed-forward network is.
pub(super) const FEED_FORWARD: usize = 4;

/// Two layers with SiLU between them, of a timestep's sines and other numbers.
pub(super) struct Embedder([Linear; 2]);

impl Embedder {
    /// Reads `linear_1` and `linear_2` at `w`.
    pub(super) fn new(w: &Weights, inputs: usize, width: usize) -> Result<Self> {
        Ok(Self([
            Linear::new(&w.at("linear_1"), inputs, width)?,
            Linear::new(&w.at("linear_2"), width, width)?,
        ]))
    }

    /// [.., inputs] -> [.., width].
    pub(super) fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
        let [first, second] = &self.0;
        second.forward(cx, &Activation::Silu.forward(&first.forward(cx, x)?)?)
    }
}

/// What the timestep makes of a layer's input and output: norm(x) * (1 + scale) + shift, and
/// x + gate * output; each [b, 1, width].
pub(super) struct Modulation {
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
}

impl Modulation {
    /// Those of n layers, in the order of the columns of one product [b, 3*n*width].
    pub(super) fn of(numbers: &Tensor, n: usize) -> TensorResult<Vec<Self>> {
        let parts = numbers.unsqueeze(1)?.chunk(3 * n, 2)?;
        let each = parts.chunks_exact(3).map(|part| Self {
            shift: part[0].clone(),
            scale: part[1].clone(),
            gate: part[2].clone(),
        });
        Ok(each.collect())
    }

    pub(super) fn enter(&self, cx: Forward, norm: &LayerNorm, x: &Tensor) -> TensorResult<Tensor> {
        let x = norm.forward(cx, x)?;
        x.broadcast_mul(&(&self.scale + 1.0)?)?
            .broadcast_add(&self.shift)
    }

    pub(super) fn leave(&self, x: &Tensor, output: &Tensor) -> TensorResult<Tensor> {
        x + output.broadcast_mul(&self.gate)?
    }
}

/// A norm that the timestep scales and shifts, in this order of its rows (diffusers'
/// `AdaLayerNormContinuous`).
pub(super) struct ContinuousNorm {
    norm: LayerNorm,
    linear: Linear,
}

impl ContinuousNorm {
    /// A norm with its layer of twice the width.
    pub(super) fn new(norm: LayerNorm, linear: Linear) -> Self {
        Self { norm, linear }
    }

    /// x [b, n, width] and the embedding of the timestep after its nonlinearity, [b, width].
    pub(super) fn forward(&self, cx: Forward, x: &Tensor, time: &Tensor) -> TensorResult<Tensor> {
        let numbers = self.linear.forward(cx, time)?.unsqueeze(1)?.chunk(2, 2)?;
        let [scale, shift] = numbers.as_slice() else {
            candle_core::bail!("an odd width cannot be halved")
        };
        let x = self.norm.forward(cx, x)?;
        x.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(shift)
    }
}

/// Two layers with the tangent's GELU between them.
struct FeedForward {
    inner: Linear,
    outer: Linear,
}

impl FeedForward {
    fn new(w: &Weights, width: usize) -> Result<Self> {
        let w = w.for_tokens();
        Ok(Self {
            inner: Linear::new(&w.at("net.0.proj"), width, FEED_FORWARD * width)?,
            outer: Linear::new(&w.at("net.2"), FEED_FORWARD * width, width)?,
        })
    }

    fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<Tensor> {
        let x = gelu_tanh(cx, &self.inner.forward(cx, x)?)?;
        self.outer.forward(cx, &x)
    }
}

/// The widths of a block.
#[derive(Clone, Copy)]
pub(super) struct Widths {
    pub(super) heads: usize,
    pub(super) head: usize,
    /// whether queries and keys are normalised
    pub(super) has_qk_norm: bool,
}

impl Widths {
    pub(super) fn all(self) -> usize {
        self.heads * self.head
    }
}

/// Queries, keys and values of a stream of tokens.
struct Projection {
    qkv: Linear,
    norms: Option<QkNorm>,
}

impl Projection {
    fn new(attn: &Weights, names: [&str; 3], norms: [&str; 2], widths: Widths) -> Result<Self> {
        let width = widths.all();
        let fused = names.map(|name| (attn.at(name), width));
        let norms = || QkNorm::new(attn, norms, (widths.heads, widths.head), EPS);
        Ok(Self {
            qkv: Linear::fused(&fused, width, true)?,
            norms: widths.has_qk_norm.then(norms).transpose()?,
        })
    }

    /// [b, n, width] each.
    fn forward(&self, cx: Forward, x: &Tensor) -> TensorResult<[Tensor; 3]> {
        let qkv = self.qkv.forward(cx, x)?;
        if let Some(norms) = &self.norms {
            return norms.split(cx, &qkv);
        }
        let parts = qkv.chunk(3, 2)?;
        let [q, k, v] = parts.as_slice() else {
            candle_core::bail!("queries, keys and values are three")
        };
        Ok([q.clone(), k.clone(), v.clone()])
    }
}

/// The layers of one of the two streams.
struct Stream {
    modulation: Linear,
    projection: Projection,
    to_out: Linear,
    ff: FeedForward,
}

/// The layers of the text's.
enum TextStream {
    Whole(Stream),
    /// of the last block, after which nothing reads it
    Last(ContinuousNorm, Projection),
}

/// Attention of the picture to itself, beside that to both.
struct DualAttention {
    projection: Projection,
    to_out: Linear,
}

/// A block in which text and picture have weights of their own and attend to both.
pub(super) struct JointBlock {
    norm: LayerNorm,
    picture: Stream,
    dual: Option<DualAttention>,
    text: TextStream,
    heads: usize,
}

/// What a block has that others have not.
#[derive(Clone, Copy, Default)]
pub(super) struct Kind {
    /// the picture attends to itself too
    pub(super) is_dual: bool,
    /// nothing reads the text after it
    pub(super) is_last: bool,
}

/// Names of the layers of a stream.
const OF_PICTURE: ([&str; 3], [&str; 2]) = (["to_q", "to_k", "to_v"], ["norm_q", "norm_k"]);
const OF_TEXT: ([&str; 3], [&str; 2]) = (
    ["add_q_proj", "add_k_proj", "add_v_proj"],
    ["norm_added_q", "norm_added_k"],
);

impl JointBlock {
    pub(super) fn new(w: &Weights, widths: Widths, kind: Kind) -> Result<Self> {
        let (width, attn) = (widths.all(), w.at("attn").for_tokens());
        let norm = || LayerNorm::without_weights(w, width, EPS);
        let projection =
            |(names, norms): ([&str; 3], [&str; 2])| Projection::new(&attn, names, norms, widths);
        let modulation = |name: &str, layers: usize| {
            Linear::new(&w.at(name).at("linear"), width, layers * width)
        };
        let dual = kind.is_dual.then(|| {
            let attn = w.at("attn2").for_tokens();
            Ok::<_, anyhow::Error>(DualAttention {
                projection: Projection::new(&attn, OF_PICTURE.0, OF_PICTURE.1, widths)?,
                to_out: Linear::new(&attn.at("to_out.0"), width, width)?,
            })
        });
        let text = if kind.is_last {
            let linear = modulation("norm1_context", 2)?;
            TextStream::Last(ContinuousNorm::new(norm()?, linear), projection(OF_TEXT)?)
        } else {
            TextStream::Whole(Stream {
                modulation: modulation("norm1_context", 6)?,
                projection: projection(OF_TEXT)?,
                to_out: Linear::new(&attn.at("to_add_out"), width, width)?,
                ff: FeedForward::new(&w.at("ff_context"), width)?,
            })
        };
        Ok(Self {
            norm: norm()?,
            picture: Stream {
                modulation: modulation("norm1", if kind.is_dual { 9 } else { 6 })?,
                projection: projection(OF_PICTURE)?,
                to_out: Linear::new(&attn.at("to_out.0"), width, width)?,
                ff: FeedForward::new(&w.at("ff"), width)?,
            },
            dual: dual.transpose()?,
            text,
            heads: widths.heads,
        })
    }

    /// Text [b, n, width] and picture [b, m, width] with the embedding of the timestep after its
    /// nonlinearity, [b, width]; positions are turned by `rotary`, text first.
    pub(super) fn forward(
        &self,
        cx: Forward,
        (text, picture): (&Tensor, &Tensor),
        time: &Tensor,
        rotary: Option<&Rotary>,
    ) -> TensorResult<(Tensor, Tensor)> {
        let modulations =
            |stream: &Stream, n| Modulation::of(&stream.modulation.forward(cx, time)?, n);
        let layers = if self.dual.is_some() { 3 } else { 2 };
        let of_picture = modulations(&self.picture, layers)?;
        let [of_attention, of_ff, of_dual @ ..] = of_picture.as_slice() else {
            candle_core::bail!("a block has two modulations")
        };
        let entered = of_attention.enter(cx, &self.norm, picture)?;
        let of_picture_qkv = self.picture.projection.forward(cx, &entered)?;
        let (of_text, of_text_qkv) = match &self.text {
            TextStream::Whole(stream) => {
                let of_text = modulations(stream, 2)?;
                let Some(of_attention) = of_text.first() else {
                    candle_core::bail!("a block has two modulations")
                };
                let entered = of_attention.enter(cx, &self.norm, text)?;
                let qkv = stream.projection.forward(cx, &entered)?;
                (Some((stream, of_text)), qkv)
            }
            TextStream::Last(norm, projection) => {
                let entered = norm.forward(cx, text, time)?;
                (None, projection.forward(cx, &entered)?)
            }
        };
        let mut both = vec![];
        for (a, b) in of_text_qkv.iter().zip(&of_picture_qkv) {
            both.push(Tensor::cat(&[a, b], 1)?);
        }
        let [q, k, v] = both.as_slice() else {
            candle_core::bail!("queries, keys and values are three")
        };
        let turned = |x: &Tensor| match rotary {
            Some(rotary) => rotary.turn(cx, x, self.heads),
            None => Ok(x.clone()),
        };
        let attended = attention(cx, &turned(q)?, &turned(k)?, v, self.heads)?;
        let tokens = text.dim(1)?;
        let part = |from, len| attended.narrow(1, from, len)?.contiguous();
        let output = self
            .picture
            .to_out
            .forward(cx, &part(tokens, picture.dim(1)?)?)?;
        let mut x = of_attention.leave(picture, &output)?;
        if let (Some(dual), [of_dual]) = (&self.dual, of_dual) {
            // it sees the picture as it was before the block
            let entered = of_dual.enter(cx, &self.norm, picture)?;
            let [q, k, v] = dual.projection.forward(cx, &entered)?;
            let attended = attention(cx, &q, &k, &v, self.heads)?;
            x = of_dual.leave(&x, &dual.to_out.forward(cx, &attended)?)?;
        }
        let entered = of_ff.enter(cx, &self.norm, &x)?;
        let picture = of_ff.leave(&x, &self.picture.ff.forward(cx, &entered)?)?;
        let Some((stream, of_text)) = of_text else {
            return Ok((text.clone(), picture));
        };
        let [of_attention, of_ff] = of_text.as_slice() else {
            candle_core::bail!("a block has two modulations")
        };
        let output = stream.to_out.forward(cx, &part(0, tokens)?)?;
        let x = of_attention.leave(text, &output)?;
        let entered = of_ff.enter(cx, &self.norm, &x)?;
        let text = of_ff.leave(&x, &stream.ff.forward(cx, &entered)?)?;
        let text = match text.dtype() {
            DType::F16 => text.clamp(-F16_MAX, F16_MAX)?,
            _ => text,
        };
        Ok((text, picture))
    }
}

/// Latents [b, h, w, c] as tokens [b, h/2*w/2, 4c] of squares, of which each has its channels one
/// after the other. Errors if a side is odd.
pub(super) fn squares(latents: &Tensor) -> TensorResult<Tensor> {
    let (b, h, w, c) = latents.dims4()?;
    if h % 2 + w % 2 > 0 {
        candle_core::bail!("latents of {h}x{w} are not made of squares of 2x2");
    }
    latents
        .reshape(&[b, h / 2, 2, w / 2, 2, c])?
        .permute([0, 1, 3, 5, 2, 4])?
        .reshape((b, h / 2 * (w / 2), 4 * c))
}
