// The schema of every op. `cpu_built` and `cuda_built` say which kernels the library was built with.
#include "common.h"

STABLE_TORCH_LIBRARY(sysdag_C, m) {
  m.def("cpu_built() -> ()");
#ifdef SYSDAG_WITH_CUDA
  m.def("cuda_built() -> ()");
#endif
  m.def(
      "preference_loss(Tensor logps, Tensor ref_logps, Tensor offsets, Tensor? lengths, float beta, int loss_type, "
      "float label_smoothing) -> (Tensor, Tensor)");
  m.def("preference_loss_backward(Tensor grad, Tensor coefficients, Tensor offsets) -> Tensor");
  m.def(
      "diverse_beam_step(Tensor logits, Tensor scores, float penalty, int num_candidates, Tensor? eos_token_ids, "
      "Tensor? done, int pad_token_id, Tensor? history, int ngram_size) -> (Tensor, Tensor, Tensor)");
#ifdef SYSDAG_WITH_CUDA
  m.def("top_log_probs(Tensor logits, int count) -> (Tensor, Tensor)");
#endif
  m.def("token_logprob_forward(Tensor logits, Tensor labels, int ignore_index) -> (Tensor, Tensor)");
  m.def(
      "token_logprob_backward(Tensor grad, Tensor logits, Tensor labels, Tensor stats, int ignore_index, "
      "Tensor(a!) out) -> ()");
  m.def("diffusion_error(Tensor eps, Tensor policy, Tensor? reference, Tensor? mask) -> Tensor");
  m.def("diffusion_error_backward(Tensor grad, Tensor eps, Tensor policy, Tensor? mask) -> Tensor");
  m.def("advise_huge_pages(Tensor(a!) memory) -> ()");
  m.def("discard_pages(Tensor(a!) memory) -> ()");
  m.def(
      "linear_logprob_stats(Tensor z, float scale, Tensor? bias, float softcap, int start, Tensor offsets, "
      "Tensor labels, Tensor(a!) top, Tensor(b!) total, Tensor(c!) chosen) -> ()");
  m.def(
      "linear_logprob_unit(Tensor(a!) z, float scale, Tensor? bias, float softcap, int start, Tensor offsets, "
      "Tensor labels, Tensor(b!) top, Tensor(c!) total, Tensor(d!) chosen, Tensor(e!) acc) -> ()");
  m.def(
      "linear_logprob_slope(Tensor z, float scale, Tensor? bias, float softcap, int start, Tensor offsets, "
      "Tensor labels, Tensor top, Tensor total, Tensor chosen, Tensor grads, Tensor row_grads, Tensor(a!) out) "
      "-> ()");
  m.def(
      "linear_logprob_combine(Tensor unit, Tensor weight, Tensor offsets, Tensor labels, Tensor coefficients, "
      "Tensor row_grads, Tensor(a!) out) -> ()");
}
