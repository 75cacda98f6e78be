// SPDX-License-Identifier: Apache-2.0
// Repeated calls of operators that go from torch's dispatcher to native.c without Python. Built on the host by calls.py.
//
// Whether a call is allowed, and which product it is, follows from its form: the dtypes, shapes and strides of its tensors and
// its other arguments. Python checks a new form with the rules of the operator, computes the call, and, if native.c computes
// such calls alone, records which product it was (nq_remember_*): later calls of that form are computed here. All other calls
// go to the Python kernel unchanged, so that there is one set of rules and all errors are Python's. Group lists, and the format
// of a weight where a rule needs it, are not part of a form and are checked in every call.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

// The most forms that a thread knows: those of a few thousand numbers of tokens, for each shape of a model's layers.
extern "C" {
int64_t nq_most_forms = 1 << 16;
}

namespace {

using i64 = int64_t;
using Arguments = c10::ArrayRef<c10::IValue>;

// nq_product and nq_dynamic_quant of native.c.
i64 (*run_product)(const void *call);
void (*run_dynamic_quant)(const void *x, i64 dtype, i64 rows, i64 columns, void *y, void *scale);

constexpr int GARBAGE = 0x7f; // numerics.fill_garbage

// ---------------------------------------------------------------------------------------------------------------- forms

using Form = std::vector<i64>;

struct Hash {
    size_t operator()(const Form &form) const {
        uint64_t hash = 0xcbf29ce484222325;
        for (i64 number : form) hash = (hash ^ static_cast<uint64_t>(number)) * 0x100000001b3;
        return hash ^ hash >> 32;
    }
};

// Appends the properties that a rule may use; false for a value of another kind.
bool append(Form &form, const c10::IValue &value) {
    if (value.isNone()) {
        form.push_back(0);
    } else if (value.isTensor()) {
        const at::Tensor &tensor = value.toTensor();
        if (!tensor.defined() || tensor.layout() != at::kStrided || !tensor.device().is_cpu()) return false;
        form.insert(form.end(), {1, static_cast<i64>(tensor.scalar_type()), tensor.dim()});
        form.insert(form.end(), tensor.sizes().begin(), tensor.sizes().end());
        form.insert(form.end(), tensor.strides().begin(), tensor.strides().end());
    } else if (value.isInt()) {
        form.insert(form.end(), {2, value.toInt()});
    } else if (value.isBool()) {
        form.insert(form.end(), {3, value.toBool()});
    } else if (value.isDouble()) {
        double number = value.toDouble();
        i64 bits;
        std::memcpy(&bits, &number, sizeof bits);
        form.insert(form.end(), {4, bits});
    } else if (value.isString()) {
        const std::string &text = value.toStringRef();
        form.insert(form.end(), {5, static_cast<i64>(text.size())});
        form.insert(form.end(), text.begin(), text.end());
    } else if (value.isList()) {
        form.insert(form.end(), {6, static_cast<i64>(value.toListRef().size())});
        for (const c10::IValue &item : value.toListRef())
            if (!append(form, item)) return false;
    } else {
        return false;
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------------- known calls

// The addresses at the head of native.c's Product that calls name, in its order.
enum { X, WEIGHT, SCALE, BIAS_INT32, BIAS_FLOAT, TOKEN_SCALE, ANTIQUANT_SCALE, ANTIQUANT_OFFSET, OPERANDS };
// Conversion of an operand for native.c.
enum { AS_IT_IS, TO_FLOAT, FLOAT_BITS };

// As calls.py packs it. `constants` are native.c's: depth, width, ..., the code of the output's dtype in the fifth place.
struct ProductCall {
    struct {
        i64 argument, conversion; // its place among the operator's arguments (alone, or in a list), or -1
    } operands[OPERANDS];
    i64 constants[8];
    i64 rows;
    i64 group_list, group_list_type; // its place, or -1: all rows times one weight
    i64 spoils_x;                    // the device splits x in place
    i64 nz_storage;                  // the StorageImpl of a weight that has to be FRACTAL_NZ, and is; else 0
};
static_assert(sizeof(ProductCall) == 232, "calls.py packs it");

struct QuantCall {
    i64 dtype, rows, columns;
};

struct Known {
    std::optional<QuantCall> quant;
    ProductCall product;
};

thread_local std::unordered_map<Form, Known, Hash> known_calls;
// Weights that are FRACTAL_NZ. While a weak reference is held no other storage can have its address.
thread_local std::unordered_map<c10::StorageImpl *, c10::weak_intrusive_ptr<c10::StorageImpl>> nz_storages;
// The form of the call that Python computes at this moment, and of which operator; null if that form cannot be known.
thread_local const Form *asked = nullptr;
thread_local const std::string *asked_operator = nullptr;
thread_local i64 computed_here = 0;

const at::Tensor &tensor_of(const c10::IValue &value) {
    return (value.isTensor() ? value : value.toListRef()[0]).toTensor();
}

// The (expert, first row, end) of every group that is not empty, as group_bounds of reference/grouped_matmul.py; false if
// that refuses.
bool group_bounds(const at::Tensor &list, i64 type, i64 rows, std::vector<i64> &bounds) {
    const i64 *numbers = list.const_data_ptr<i64>();
    i64 start = 0, before = 0, experts = list.size(0);
    bool ended = false;
    for (i64 at = 0; at < experts; at++) {
        i64 expert = type == 2 ? numbers[2 * at] : at;
        i64 count = type == 2 ? numbers[2 * at + 1] : type == 1 ? numbers[at] : numbers[at] - before;
        before = numbers[at];
        if (count < 0 || count > rows - start) return false;
        if (type == 2 && count && (ended || expert < 0 || expert >= experts)) return false;
        ended = ended || !count;
        if (count) bounds.insert(bounds.end(), {expert, start, start + count});
        start += count;
    }
    return true;
}

void fill_garbage(const at::Tensor &tensor) {
    if (tensor.is_floating_point())
        tensor.fill_(NAN);
    else
        std::memset(tensor.mutable_data_ptr(), GARBAGE, tensor.nbytes());
}

// An operand as native.c takes it: only the experts that have rows, if these are few.
at::Tensor converted(const at::Tensor &given, i64 conversion, bool of_experts, const std::vector<i64> &bounds) {
    at::ScalarType dtype = conversion == TO_FLOAT ? at::kFloat : at::kInt;
    if (!of_experts || 2 * static_cast<i64>(bounds.size() / 3) >= given.size(0)) return given.to(dtype);
    at::Tensor chosen(at::detail::empty_cpu(given.sizes(), dtype));
    for (size_t at = 0; at < bounds.size(); at += 3) chosen.select(0, bounds[at]).copy_(given.select(0, bounds[at]));
    return chosen;
}

// A computed product, or nothing if Python has to handle the call.
std::optional<at::Tensor> compute(const Known &known, Arguments arguments) {
    static constexpr at::ScalarType DTYPES[] = {at::kBFloat16, at::kHalf, at::kFloat, at::kInt};
    const ProductCall &call = known.product;
    if (call.nz_storage) {
        const at::Tensor &weight = tensor_of(arguments[call.operands[WEIGHT].argument]);
        if (!nz_storages.count(weight.storage().unsafeGetStorageImpl())) return std::nullopt;
    }
    bool grouped = call.group_list >= 0;
    std::vector<i64> bounds;
    if (!grouped)
        bounds = {0, 0, call.rows};
    else if (!group_bounds(arguments[call.group_list].toTensor(), call.group_list_type, call.rows, bounds))
        return std::nullopt;
    std::array<at::Tensor, OPERANDS> held;
    // native.c's Product: the operands' addresses, output, groups, their number, constants.
    std::array<i64, OPERANDS + 3 + 8> native{};
    for (int at = 0; at < OPERANDS; at++) {
        auto [argument, conversion] = call.operands[at];
        if (argument < 0) continue;
        const at::Tensor &given = tensor_of(arguments[argument]);
        if (conversion != AS_IT_IS) held[at] = converted(given, conversion, grouped, bounds);
        native[at] = reinterpret_cast<i64>((conversion == AS_IT_IS ? given : held[at]).const_data_ptr());
    }
    at::Tensor out(at::detail::empty_cpu({call.rows, call.constants[1]}, DTYPES[call.constants[4]]));
    native[OPERANDS] = reinterpret_cast<i64>(out.mutable_data_ptr());
    native[OPERANDS + 1] = reinterpret_cast<i64>(bounds.data());
    native[OPERANDS + 2] = static_cast<i64>(bounds.size() / 3);
    std::copy(std::begin(call.constants), std::end(call.constants), native.begin() + OPERANDS + 3);
    if (!bounds.empty() && !run_product(native.data())) return std::nullopt; // no memory: Python reports it
    if (grouped) {
        i64 covered = bounds.empty() ? 0 : bounds.back();
        if (covered < call.rows) fill_garbage(out.narrow(0, covered, call.rows - covered));
        if (call.spoils_x) fill_garbage(tensor_of(arguments[call.operands[X].argument]));
    }
    return out;
}

std::pair<at::Tensor, at::Tensor> quantize(const QuantCall &call, const at::Tensor &x) {
    at::Tensor y(at::detail::empty_cpu(x.sizes(), at::kChar));
    at::Tensor scale(at::detail::empty_cpu(x.sizes().slice(0, x.dim() - 1), at::kFloat));
    run_dynamic_quant(x.const_data_ptr(), call.dtype, call.rows, call.columns, y.mutable_data_ptr(), scale.mutable_data_ptr());
    return {std::move(y), std::move(scale)};
}

// ------------------------------------------------------------------------------------------------------------- operators

// The CPU kernel of one operator.
class Entry final : public c10::OperatorKernel {
  public:
    Entry(std::string name, c10::OperatorHandle python) : name_(std::move(name)), python_(std::move(python)) {}

    void operator()(const c10::OperatorHandle &op, c10::DispatchKeySet keys, torch::jit::Stack *stack) {
        size_t count = op.schema().arguments().size();
        bool listed = op.schema().returns()[0].type()->kind() == c10::TypeKind::ListType;
        static thread_local Form form;
        form.assign(1, reinterpret_cast<i64>(this));
        bool knowable = true;
        for (const c10::IValue &value : torch::jit::last(*stack, count)) knowable = knowable && append(form, value);
        if (knowable) {
            auto found = known_calls.find(form);
            if (found != known_calls.end() && computed(found->second, *stack, count, listed)) return;
        }
        // The Python kernel may call operators, this one too.
        Form kept;
        if (knowable) kept = form;
        struct Restore {
            const Form *form;
            const std::string *name;
            ~Restore() { asked = form, asked_operator = name; }
        } restore{std::exchange(asked, knowable ? &kept : nullptr), std::exchange(asked_operator, &name_)};
        python_.redispatchBoxed(keys, stack);
    }

  private:
    static bool computed(const Known &known, torch::jit::Stack &stack, size_t count, bool listed) {
        Arguments arguments = torch::jit::last(stack, count);
        if (known.quant) {
            auto [y, scale] = quantize(*known.quant, arguments[0].toTensor());
            torch::jit::drop(stack, count);
            torch::jit::push(stack, std::move(y), std::move(scale));
        } else {
            std::optional<at::Tensor> out = compute(known, arguments);
            if (!out) return false;
            torch::jit::drop(stack, count);
            if (listed)
                torch::jit::push(stack, c10::List<at::Tensor>({std::move(*out)}));
            else
                torch::jit::push(stack, std::move(*out));
        }
        computed_here++;
        return true;
    }

    std::string name_;
    c10::OperatorHandle python_;
};

// Without memory the call is not remembered: nothing may be thrown through Python.
void remember(const char *name, const Known &known) noexcept {
    if (!asked || *asked_operator != name) return;
    try {
        if (auto *storage = reinterpret_cast<c10::StorageImpl *>(known.quant ? 0 : known.product.nz_storage)) {
            if (static_cast<i64>(nz_storages.size()) >= nq_most_forms) nz_storages.clear();
            nz_storages.emplace(storage, c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage));
        }
        if (static_cast<i64>(known_calls.size()) >= nq_most_forms && !known_calls.count(*asked)) known_calls.clear();
        known_calls.insert_or_assign(*asked, known);
    } catch (const std::bad_alloc &) {
    }
}

} // namespace

extern "C" {

void nq_use_kernels(void *product, void *dynamic_quant) {
    run_product = reinterpret_cast<decltype(run_product)>(product);
    run_dynamic_quant = reinterpret_cast<decltype(run_dynamic_quant)>(dynamic_quant);
}

// Defines an operator for a Python kernel, and makes an Entry before it the CPU kernel of another of the same schema.
// Nothing is freed: at process exit the dispatcher may be destroyed first. They return 0, or 1 if torch refuses.
int nq_define(const char *space, const char *schema) {
    try {
        auto *library = new torch::Library(torch::Library::FRAGMENT, space, std::nullopt, __FILE__, __LINE__);
        library->def(schema);
        return 0;
    } catch (const std::exception &) {
        return 1;
    }
}

int nq_install(const char *space, const char *name, const char *python) {
    try {
        c10::OperatorHandle handle = c10::Dispatcher::singleton().findSchemaOrThrow(python, "");
        auto *library = new torch::Library(torch::Library::IMPL, space, c10::DispatchKey::CPU, __FILE__, __LINE__);
        auto entry = std::make_unique<Entry>(name, std::move(handle));
        library->impl(name, torch::CppFunction::makeFromBoxedFunctor(std::move(entry)));
        return 0;
    } catch (const std::exception &) {
        return 1;
    }
}

void nq_remember_product(const char *name, const void *packed) {
    Known known{};
    std::memcpy(&known.product, packed, sizeof known.product);
    remember(name, known);
}

void nq_remember_dynamic_quant(const char *name, i64 dtype, i64 rows, i64 columns) {
    remember(name, Known{QuantCall{dtype, rows, columns}, {}});
}

// How many calls of this thread were computed without Python; for tests.
i64 nq_computed_here(void) { return computed_here; }
}
